#!/usr/bin/env bash
# From a clean clone to a trained tiny Llama: two ranks, ZeRO-2, LoRAPre from the DeepSpeed JSON, text that needs no
# download. Writes runs/quickstart. --optimizer LoRAPreMuon, LoRAPreAdafactor, LoRAPreLion or LoRAPreSGD takes that one instead;
# other options are passed on to launch/pretrain.py. See launch/env.sh for the variables that change where things go.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
source launch/env.sh

OPTIMIZER=LoRAPre
OPTIONS=()
while [ $# -gt 0 ]; do
    case "$1" in
        --optimizer) OPTIMIZER="${2-}"; shift $(($# > 1 ? 2 : 1)) ;;
        --optimizer=*) OPTIMIZER="${1#*=}"; shift ;;
        *) OPTIONS+=("$1"); shift ;;
    esac
done
case "${OPTIMIZER,,}" in
    lorapre) CONFIG=ds_configs/tiny_zero2.json ;;
    lorapreadafactor | loraprelion | lorapremuon | lorapresgd) NAME="${OPTIMIZER,,}"; CONFIG="ds_configs/tiny_zero2_${NAME#lorapre}.json" ;;
    *)
        echo "error: --optimizer '$OPTIMIZER': must be LoRAPre, LoRAPreMuon, LoRAPreAdafactor, LoRAPreLion or LoRAPreSGD" >&2
        exit 2
        ;;
esac
set_up

OUT=runs/quickstart
rm -rf "$OUT"
RANKS="$(python -c 'import torch; print(min(2, torch.cuda.device_count()) or 2)')"
say "training llama-tiny on $RANKS ranks by $OPTIMIZER"
SECONDS=0
PORT="$(free_port)"
deepspeed --log_level error --num_gpus "$RANKS" --master_addr 127.0.0.1 --master_port "$PORT" launch/pretrain.py \
    --model llama-tiny --deepspeed_config "$CONFIG" --dataset builtin --data_cache "$LORAPRE_CACHE/data" \
    --seq_len 128 --max_steps 800 --warmup_steps 40 --eval_every 100 --save_every 400 \
    --output_dir "$OUT" --resume none ${OPTIONS[@]+"${OPTIONS[@]}"}

say "done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
python - "$OUT/summary.json" <<'PY'
import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    result = json.load(file)
before, after = result["eval_loss_before"], result["eval_loss_after"]
ours, adamw = result["optimizer_state_bytes"], result["adamw_state_bytes"]
print(f"eval loss        {before:.3f} before, {after:.3f} after: {before - after:.2f} nats lower")
print(f"optimizer state  {ours / 2**20:.2f} MiB per rank, AdamW would hold {adamw / 2**20:.2f} MiB ({ours / adamw:.0%})")
print(f"plot             {result['plot']}")
sys.exit(0 if before - after >= 2.0 else "error: the eval loss fell by less than 2 nats")
PY
