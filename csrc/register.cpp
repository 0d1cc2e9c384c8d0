// megatron_replay._C: importing it registers the compiled operators with torch, under torch.ops.megatron_replay.
#include <Python.h>
#include <torch/library.h>

#include "cpu/isa.h"
#include "cpu/optimizer.h"
#include "cpu/restricted.h"

// megatron_replay/kernels/schemas.py has the schemas, and kernels/library.py defines the operators.
TORCH_LIBRARY_IMPL(megatron_replay, CPU, library) {
  library.impl("restricted_fwd", &megatron_replay::restricted_fwd);
  library.impl("restricted_bwd_dh", &megatron_replay::restricted_bwd_dh);
  library.impl("restricted_bwd_dw", &megatron_replay::restricted_bwd_dw);
  library.impl("restricted_bwd_rows", &megatron_replay::restricted_bwd_rows);
  library.impl("restricted_logits_fwd", &megatron_replay::restricted_logits_fwd);
  library.impl("restricted_logits_bwd", &megatron_replay::restricted_logits_bwd);
  library.impl("topk_rows", &megatron_replay::topk_rows);
  library.impl("optimizer_sums", &megatron_replay::optimizer_sums);
  library.impl("adam_update", &megatron_replay::adam_update);
}

namespace {

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(megatron_replay::isa_name().c_str()); }

PyObject* use_isa(PyObject*, PyObject* argument) {
  const char* name = PyUnicode_AsUTF8(argument);
  if (!name) return nullptr;
  return PyBool_FromLong(megatron_replay::use_isa(name));
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set in use: baseline, avx2 or avx512."},
    {"use_isa", use_isa, METH_O, "Take another instruction set; False where it is unknown or this processor lacks it."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Compiled operators of megatron_replay.", -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
