#!/usr/bin/env bash
# Is LoRA-Pre as good as AdamW on a model of 60M to 350M parameters? Every run is on one GPU, as many at once as there are
# GPUs; what was stopped goes on where it was, run by run. Results: runs/study/MODEL/{field.md,field.csv,field.svg}.
#
#   launch/study.sh llama-60m                        or llama-130m, llama-350m: GaLore's protocol on C4
#   launch/study.sh llama-60m --rows adamw lorapre-8 --seeds 0
#   launch/study.sh llama-tiny                       minutes on two CPU cores, on the built-in text
#
# What follows the model goes to `python -m lorapre_dist.bench field`, whose later options take the place of these.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
source launch/env.sh
[ $# -ge 1 ] || fail "which model? launch/study.sh llama-60m | llama-130m | llama-350m | llama-tiny"
model="$1"
shift
# Steps, as many for the search, sequences of one forward and backward
case "$model" in
    llama-60m) sizes=(10000 1000 128) ;;
    llama-130m) sizes=(20000 2000 64) ;;
    llama-350m) sizes=(60000 3000 32) ;;
    llama-tiny) sizes=(1000 300 8) ;;
    *) fail "$model: llama-60m, llama-130m, llama-350m or llama-tiny" ;;
esac
set_up
options=(--model "$model" --out "runs/study/$model" --steps "${sizes[0]}" --screen_steps "${sizes[1]}" --micro_batch "${sizes[2]}")
options+=(--rows adamw lorapre-8 lorapre-32 muon lorapre-muon-32 galore-8 apollo-8 fira-8)
if [ "$model" != llama-tiny ]; then
    gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
    [ "$gpus" -ge 1 ] || fail "$model needs a GPU, and PyTorch finds none; llama-tiny runs on CPUs"
    options+=(--dataset c4 --batch 512 --seq_len 256 --warmup $((sizes[0] / 10)) --precision bf16 --eval_batches 76 --device cuda --jobs "$gpus")
fi
exec python -m lorapre_dist.bench field "${options[@]}" "$@"
