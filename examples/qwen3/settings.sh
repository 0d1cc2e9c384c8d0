# shellcheck shell=bash disable=SC2034
# What the scripts here share; any of it can be set on the command line:
#   MODEL=8b NODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash examples/qwen3/4_train.sh
MODEL=${MODEL:-4b}              # 0.6b | 4b | 8b
DEVICE=${DEVICE:-npu}           # npu | cuda | cpu
NODES=${NODES:-1}               # 1 | 2 | 4: the further nodes are data parallel
MASTER_ADDR=${MASTER_ADDR:-}    # address of node 0, when there are several
MASTER_PORT=${MASTER_PORT:-29500}
HOSTFILE=${HOSTFILE:-}          # a host a line, for START=--ssh
START=${START:-}                # --dry-run, --ssh, or --slurm=job.sbatch; without it this node starts its part (NODE_RANK)

case $MODEL in
    0.6b) NAME=Qwen3-0.6B TP=${TP:-1} PP=${PP:-1} ;;
    4b) NAME=Qwen3-4B TP=${TP:-4} PP=${PP:-1} ;;
    8b) NAME=Qwen3-8B TP=${TP:-4} PP=${PP:-2} ;;
    *) echo "MODEL=$MODEL is none of 0.6b, 4b, 8b" >&2; exit 2 ;;
esac
DEVICES=${DEVICES:-$((TP * PP))} # of each node
MBS=${MBS:-1}
GBS=${GBS:-16}
SEQ_LEN=${SEQ_LEN:-4096}

CONFIG=examples/qwen3/$MODEL.yaml
HF=models/$NAME                 # the model, a Hugging Face folder
BASE=runs/qwen3-$MODEL/base     # the same as a megatron checkpoint
TRAINED=runs/qwen3-$MODEL/checkpoint

read -ra FLAGS <<< "$START"
LAUNCH=(megatron-replay launch "${FLAGS[@]}" "nodes=$NODES" "devices=$DEVICES" "device=$DEVICE"
    "master=$MASTER_ADDR" "port=$MASTER_PORT" "hostfile=$HOSTFILE")
LAYOUT=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP")
