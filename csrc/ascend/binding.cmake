# megatron_replay._npu: torch_binding.cpp and the kernels, for the Python that will load it. setup.py describes that
# Python: REPLAY_TORCH and REPLAY_TORCH_NPU (the packages' folders), REPLAY_PYTHON_INCLUDE, REPLAY_SUFFIX (of its
# modules), REPLAY_STANDARD (torch's C++).
if(NOT EXISTS "${REPLAY_TORCH_NPU}/include")
  message(FATAL_ERROR "torch-npu is not installed for this Python; pip install the torch-npu of your torch's version")
endif()
add_library(_npu MODULE torch_binding.cpp)
set_target_properties(_npu PROPERTIES PREFIX "" SUFFIX "${REPLAY_SUFFIX}" CXX_STANDARD "${REPLAY_STANDARD}")
target_include_directories(_npu PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
target_include_directories(_npu SYSTEM PRIVATE "${REPLAY_TORCH}/include"
                           "${REPLAY_TORCH}/include/torch/csrc/api/include"
                           "${REPLAY_TORCH_NPU}/include" "${REPLAY_PYTHON_INCLUDE}")
target_link_directories(_npu PRIVATE "${REPLAY_TORCH}/lib" "${REPLAY_TORCH_NPU}/lib" "${ASCEND_HOME_PATH}/lib64")
target_link_libraries(_npu PRIVATE replay_ascend_kernels replay_ascend_host torch_npu torch_cpu c10 ascendcl)
