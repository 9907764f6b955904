#!/bin/bash
# bash benchmarks/lease.sh A|B : the two parts of 15 minutes on an H200. Wheels in .whl, results in $OUT, worlds in memory.
t0=$SECONDS
O=/tmp/out; mkdir -p $O
[ -d /tmp/site/peft ] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit 1
export PYTHONPATH=/tmp/site:$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True OMP_NUM_THREADS=8
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader; df -h /dev/shm /tmp | tail -2; free -g | sed -n 2p
keep() { tar czf $OUT/all.tgz.part -C $O . && mv $OUT/all.tgz.part $OUT/all.tgz; echo "== $1 ended at $((SECONDS-t0)) s"; }
part() { timeout $(( $2 * 60 / 10 + 15 )) python3 benchmarks/gpu.py --results $O/gpu.jsonl --scratch ${W:-/dev/shm/w} --steps $3 --minutes $(( $2 / 10 )).$(( $2 % 10 )) --set ${@:4} -- $1 > $O/$1.log 2>&1; tail -c 1500 $O/$1.log; keep $1; }
[ "$(df -k --output=avail /dev/shm | tail -1)" -gt 50000000 ] || W=/tmp/w   # 7B needs 13.5 GB, 20B 41 GB
if [ "$1" = A ]; then
  OUT=$O timeout 170 python3 benchmarks/smoke.py --seconds 120 > $O/smoke.log 2>&1; grep -v '"ok": true' $O/smoke.jsonl | cut -c1-400; grep -c '"ok": true' $O/smoke.jsonl; keep smoke
  part smollm2 8 3 generation.cuda_graphs=auto
  part llama_7b_bf16 36 1
else
  FEW="ppo.rollout_batch_size=64 ppo.minibatch_size=32 generation.batch_size=64"
  part llama_7b_nf4 22 1 $FEW                 # the world of 7B is still there; a quarter of the rows
  part neox_20b_nf4 30 1
fi
