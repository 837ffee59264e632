#!/usr/bin/env bash
# Pretrain on several nodes. On each of them, with a file system that they share:
#
#   NODES=2 RENDEZVOUS=first-node:29400 RUN=gpt2 scripts/torchrun.sh --model d12 --zero_stage 1 ...
#
# A rank that fails, or a node that leaves, starts all ranks again from the newest intact checkpoint. Whoever reaches the
# ports of the ranks can run code as you: the nodes belong into a private network (docs/security.md).
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
: "${NODES:?how many nodes}" "${RENDEZVOUS:?host:port on the first node}" "${RUN:?a name, for runs/NAME}"

source scripts/own_cache.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a store of its own for every round, also where nodes come and go
# Seconds that ranks have to finish their step and to save, once a signal came.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

exec torchrun --nnodes "$NODES" --nproc_per_node "${RANKS_PER_NODE:-gpu}" --max-restarts "${RESTARTS:-3}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --rdzv_backend c10d --rdzv_endpoint "$RENDEZVOUS" --rdzv_id "$RUN" \
    train.py --output_dir "runs/$RUN" --resume auto --checkpoint_every 500 "$@"
