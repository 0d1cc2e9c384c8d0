#!/usr/bin/env bash
# CANN's environment and the driver's libraries, then the command.
set -eo pipefail
# shellcheck disable=SC1091
source /usr/local/Ascend/ascend-toolkit/set_env.sh
export LD_LIBRARY_PATH=/usr/local/Ascend/driver/lib64/driver:/usr/local/Ascend/driver/lib64/common:$LD_LIBRARY_PATH
exec "$@"
