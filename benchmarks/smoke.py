"""Every GPU path once, on toy models, against the CPU. Run in the repository's root: python smoke.py [--device cpu] [--only WORD].

One line a check, in $OUT/smoke.jsonl too, as it goes. Nothing here needs more than 2 GiB of GPU memory.
"""

import argparse, json, logging, os, sys, tempfile, time, traceback
from pathlib import Path

sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "benchmarks")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cuda")
parser.add_argument("--only", default="")
parser.add_argument("--seconds", type=float, default=150)
parser.add_argument("--skip", default="compile")
options = parser.parse_args()
GPU = torch.device(options.device)
OUT = Path(os.environ.get("OUT", ".")) / "smoke.jsonl"
started = time.perf_counter()
import lightning  # noqa: E402
from world import NEVER, SHAPES, make_stage, make_world, train  # noqa: E402
import rlhf.seeding as seeding, rlhf.stages.evaluation as evaluation  # noqa: E402,E401
from rlhf.tracking.metrics_file import read_metrics  # noqa: E402

evaluation.generator = lambda seed, purpose, step, device="cpu": seeding.generator(
    seed, purpose, step
)  # the CPU's draws on both
torch.set_float32_matmul_precision = lambda *_: None  # no TF32: float32 must agree to 1e-4
warned: list[str] = []


class Note(logging.Handler):
    def emit(self, record):
        warned.append(record.getMessage())


logging.getLogger("rlhf").addHandler(Note())


def say(name, **found):
    line = {"check": name, "at": round(time.perf_counter() - started, 1), **found}
    print(json.dumps(line), flush=True)
    with OUT.open("a") as file:
        file.write(json.dumps(line) + "\n")


def check(name):
    def run(function):
        if (
            options.only not in name
            or (options.skip and options.skip in name)
            or time.perf_counter() - started > options.seconds
        ):
            return
        warned.clear()
        begun = time.perf_counter()
        try:
            found = function() or {}
        except Exception as error:
            found = {
                "ok": False,
                "error": f"{type(error).__name__}: {error}"[:600],
                "where": traceback.format_exc().splitlines()[-4:-1],
            }
        say(
            name,
            **{"ok": True, **found},
            seconds=round(time.perf_counter() - begun, 2),
            warned=[w[:160] for w in warned[:2]],
        )

    return run


folder = Path(tempfile.mkdtemp())


def world(shape, dtype=torch.float32):
    return make_world(
        folder / f"{shape}-{dtype}", SHAPES[shape], (4, 12), -1.0, 16, dtype=dtype
    )  # some responses end early


COMMON = (
    "divergence=kl",
    "ppo.rollout_batch_size=16",
    "ppo.minibatch_size=8",
    "ppo.epochs=2",
    "ppo.microbatch_tokens=128",
    "generation.max_new_tokens=24",
    "generation.batch_size=16",
    "ppo.steps=3",
)


def steps(device, shape="toy", dtype="float32", lora="r8", extra=()):
    """Metrics of three PPO steps through Lightning."""
    targets = ["lora.target_modules=[query_key_value,dense]"] if "neox" in shape else []
    where = Path(tempfile.mkdtemp())
    stage = make_stage(
        world(shape, getattr(torch, dtype)),
        [f"lora={lora}", *targets, f"model.dtype={dtype}", *COMMON, *extra],
        where,
        str(device),
    )
    train(stage, world(shape, getattr(torch, dtype)).prompts, where)
    return read_metrics(where)


KEYS = (
    "ppo/reward",
    "ppo/response_tokens",
    "ppo/policy_loss",
    "ppo/value_loss",
    "ppo/grad_norm",
    "ppo/entropy",
    "ppo/k1",
    "ppo/explained_variance",
)


def compared(a, b, keys=KEYS):
    gaps = {key: max(abs(x.get(key, 0) - y.get(key, 0)) for x, y in zip(a, b)) for key in keys}
    worst = max(gaps, key=gaps.get)
    return worst, gaps[worst]


def same(tolerance, **kind):
    def run():
        ours, theirs = (
            steps(GPU, **kind),
            steps(
                "cpu",
                **{
                    **kind,
                    "extra": [e for e in kind.get("extra", ()) if "cuda_graphs" not in e and "compile" not in e],
                },
            ),
        )
        worst, gap = compared(ours, theirs)
        first = [line["ppo/first_ratio"] for line in ours]
        return {
            "ok": gap < tolerance,
            "worst": worst,
            "gap": gap,
            "first_ratio": first,
            "seconds_a_step": [round(x["time/generate"] + x["time/score"] + x["time/update"], 3) for x in ours],
        }

    return run


if GPU.type == "cuda":
    say(
        "machine",
        torch=torch.__version__,
        gpu=torch.cuda.get_device_name(),
        cudnn=torch.backends.cudnn.version(),
        free=torch.cuda.mem_get_info()[0] / 2**30,
    )

    @check("sdpa: milliseconds of a shape's first call, of its second, cuDNN allowed or not")
    def _():
        import torch.nn.functional as F

        found = {}
        for allowed in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(allowed)
            rows = []
            for time_ in (401, 402, 403) if allowed else (411, 412, 413):
                q, k, v = (
                    torch.randn(4, 32, time_, 128, device=GPU, dtype=torch.bfloat16, requires_grad=True)
                    for _ in range(3)
                )
                laps = []
                for _ in range(2):
                    torch.cuda.synchronize()
                    t = time.perf_counter()
                    F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
                    torch.cuda.synchronize()
                    laps.append(round(1e3 * (time.perf_counter() - t), 2))
                rows.append(laps)
            one = torch.randn(64, 32, 1, 128, device=GPU, dtype=torch.bfloat16)
            keys = torch.randn(64, 32, 512, 128, device=GPU, dtype=torch.bfloat16)
            decode = []
            for end in (301, 302, 303) if allowed else (311, 312, 313):
                mask = torch.ones(64, 1, 1, end, dtype=torch.bool, device=GPU)
                torch.cuda.synchronize()
                t = time.perf_counter()
                F.scaled_dot_product_attention(one, keys[:, :, :end], keys[:, :, :end], attn_mask=mask)
                torch.cuda.synchronize()
                decode.append(round(1e3 * (time.perf_counter() - t), 2))
            found["cudnn allowed" if allowed else "not"] = {"forward+backward": rows, "decode": decode}
        return found  # cuDNN stays off: toy shapes would each build a plan


for name, kind in {
    "float32": {},
    "float32 graphs": {"extra": ("generation.cuda_graphs=auto",)},
    "float32 neox": {"shape": "toy_neox"},
    "float32 neox graphs": {"shape": "toy_neox", "extra": ("generation.cuda_graphs=auto",)},
    "float32 trunk_head": {"extra": ("ppo.value_model=trunk_head",)},
    "float32 exact divergence": {"extra": ("divergence=jensen_shannon",)},
    "float32 lora=none": {"lora": "none"},
    "float32 checkpointing": {"extra": ("model.gradient_checkpointing=true",)},
    "float32 target_kl standardize": {"extra": ("ppo.target_kl=10", "ppo.score_normalization=standardize")},
    "float32 compile": {"extra": ("model.compile=true",)},
}.items():
    check(f"ppo {name} against the CPU")(same(2e-3, **kind))
for name, kind in {
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 graphs": {"dtype": "bfloat16", "extra": ("generation.cuda_graphs=auto",)},
    "bfloat16 dropout": {"dtype": "bfloat16", "lora": "paper"},
    "bfloat16 dropout checkpointing": {
        "dtype": "bfloat16",
        "lora": "paper",
        "extra": ("model.gradient_checkpointing=true",),
    },
    "int8": {"dtype": "bfloat16", "extra": ("quantization=int8",)},
    "int8 checkpointing": {"dtype": "bfloat16", "extra": ("quantization=int8", "model.gradient_checkpointing=true")},
    "int8 graphs dropout (a capture that fails must leave the generator usable)": {
        "dtype": "bfloat16",
        "lora": "paper",
        "extra": ("quantization=int8", "generation.cuda_graphs=auto"),
    },
    "nf4": {"dtype": "bfloat16", "extra": ("quantization=nf4",)},
    "nf4 graphs": {"dtype": "bfloat16", "extra": ("quantization=nf4", "generation.cuda_graphs=auto")},
}.items():

    @check(f"ppo {name}: finite, the first ratio is 1")
    def _(kind=kind):
        lines = steps(GPU, **kind)
        ratios = [line["ppo/first_ratio"] for line in lines]
        return {
            "ok": all(abs(x - 1) < 1e-6 for x in ratios) and all(line["ppo/grad_norm"] < 1e4 for line in lines),
            "first_ratio": ratios,
            "grad_norm": [round(line["ppo/grad_norm"], 4) for line in lines],
            "reward": [round(line["ppo/reward"], 4) for line in lines],
        }


for kind in ("none", "int8", "nf4"):

    @check(f"quantization={kind}: where the model is after a trainer, and whether it still answers")
    def _(kind=kind):
        from rlhf.models.sequences import Sequences

        where = Path(tempfile.mkdtemp())
        w = world("toy", torch.bfloat16)
        stage = make_stage(
            w,
            ["lora=r8", "model.dtype=bfloat16", *COMMON, *([f"quantization={kind}"] if kind != "none" else [])],
            where,
            str(GPU),
        )
        batch = Sequences.from_lists([[3, 4, 5]] * 4, [[6, 7, 8]] * 4)

        def score():
            with torch.no_grad():
                return stage.roles.last_token_scores("reward", batch).cpu()

        stage.roles.eval()
        before = score()
        train(stage, w.prompts, where)
        stage.roles.eval()
        after = score()
        return {
            "ok": stage.roles.device.type == GPU.type and bool(torch.allclose(before, after, atol=2e-2)),
            "device": str(stage.roles.device),
            "gap": float((before - after).abs().max()),
        }


@check("the same bits twice (bfloat16, no determinism asked for)")
def _():
    a, b = steps(GPU, dtype="bfloat16"), steps(GPU, dtype="bfloat16")
    worst, gap = compared(a, b)
    return {"ok": gap == 0, "worst": worst, "gap": gap}


@check("varlen: torch's own kernels against sdpa in float64, and milliseconds beside padded sdpa")
def _():
    import torch.nn.functional as F

    if GPU.type != "cuda":
        return
    aten, found = torch.ops.aten, {}
    for name, heads, groups, width, dtype in (
        ("7B", 32, 32, 128, torch.bfloat16),
        ("smollm2", 9, 3, 64, torch.bfloat16),
        ("7B f32", 32, 32, 128, torch.float32),
        ("gptneox f32", 64, 64, 96, torch.float32),
    ):
        try:
            lengths = torch.randint(300, 492, (8,)).tolist()
            total, longest = sum(lengths), max(lengths)
            bounds = torch.tensor([0, *lengths]).cumsum(0).to(GPU, torch.int32)
            q, g = (torch.randn(total, heads, width, device=GPU, dtype=dtype) for _ in range(2))
            k, v = (torch.randn(total, groups, width, device=GPU, dtype=dtype) for _ in range(2))

            def exact():
                x, y, z = (a.double().requires_grad_() for a in (q, k, v))
                out = []
                for i in range(8):
                    part = slice(int(bounds[i]), int(bounds[i + 1]))
                    out.append(
                        F.scaled_dot_product_attention(
                            *(
                                a[part].transpose(0, 1)[None].repeat_interleave(heads // a.shape[1], 1)
                                for a in (x, y, z)
                            ),
                            is_causal=True,
                        )[0].transpose(0, 1)
                    )
                out = torch.cat(out)
                out.backward(g.double())
                return [out.detach(), x.grad, y.grad, z.grad]

            def flash():
                out, sums, rng, unused, _ = aten._flash_attention_forward(
                    q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=None
                )
                return [
                    out,
                    *aten._flash_attention_backward(
                        g, q, k, v, out, sums, bounds, bounds, longest, longest, 0.0, True, rng, unused, scale=None
                    ),
                ]

            def efficient():
                a, b = (x.repeat_interleave(heads // groups, 1)[None] for x in (k, v))
                c, e = q[None], g[None]
                out, sums, seed, offset, mq, mk = aten._efficient_attention_forward(
                    c, a, b, None, bounds, bounds, longest, longest, 0.0, 1, True
                )
                grads = aten._efficient_attention_backward(
                    e, c, a, b, None, out, bounds, bounds, mq, mk, sums, 0.0, seed, offset, 1, False
                )[:3]
                return [out[0], grads[0][0], *(x[0].unflatten(1, (groups, -1)).sum(2) for x in grads[1:])]

            padded = [
                torch.randn(8, h, longest, width, device=GPU, dtype=dtype, requires_grad=True)
                for h in (heads, groups, groups)
            ]
            mask = torch.ones(8, 1, longest, longest, dtype=torch.bool, device=GPU).tril()

            def sdpa(**kind):
                a, b, c = padded
                return F.scaled_dot_product_attention(a, b, c, enable_gqa=heads != groups, **kind).sum().backward()

            found[name] = {}
            want = exact()
            for what, run in (
                ("flash", flash),
                ("efficient", efficient),
                ("sdpa causal", lambda: sdpa(is_causal=True)),
                ("sdpa mask", lambda: sdpa(attn_mask=mask)),
            ):
                try:
                    got = run()
                    gaps = (
                        [float((a.double() - b).abs().max()) for a, b in zip(got, want)]
                        if isinstance(got, list)
                        else None
                    )
                    torch.cuda.synchronize()
                    t = time.perf_counter()
                    for _ in range(10):
                        run()
                    torch.cuda.synchronize()
                    found[name][what] = {"gaps": gaps, "ms": round(100 * (time.perf_counter() - t), 3)}
                    if isinstance(got, list):
                        found[name][what]["again"] = all(bool((a == b).all()) for a, b in zip(got, run()))
                except Exception as error:
                    found[name][what] = f"{type(error).__name__}: {error}"[:160]
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return found


@check("syncs: host syncs of a PPO run of three steps, by place")
def _():
    import collections, warnings

    if GPU.type != "cuda":
        return
    places, old = collections.Counter(), warnings.showwarning

    def show(message, *a, **k):
        if "synchroniz" in str(message):
            frames = [
                f"{f.filename.split('/rlhf/')[-1]}:{f.lineno} {f.line[:60]}"
                for f in traceback.extract_stack()
                if "/rlhf/" in f.filename or "site-packages" in f.filename or "dist-packages" in f.filename
            ]
            ours = [f for f in frames if "site" not in f and not f.startswith("/")]
            places[(ours or frames or ["?"])[-1]] += 1

    warnings.showwarning = show
    warnings.simplefilter("always")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        lines = steps(GPU, dtype="bfloat16", extra=("generation.cuda_graphs=auto",))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        warnings.showwarning = old
        warnings.simplefilter("ignore")
    return {"steps": len(lines), "syncs": sum(places.values()), "places": dict(places.most_common(40))}


for graphs in ("never", "auto"):

    @check(f"profile: kernels of one step of SmolLM2's shape, by device time, cuda_graphs={graphs}")
    def _(graphs=graphs):
        if GPU.type != "cuda":
            return
        from gpu import SMALL
        from torch.profiler import ProfilerActivity, profile

        w = make_world(folder / "smollm2", SHAPES["smollm2_135m"], (16, 128), NEVER, 256, "cuda", torch.bfloat16)
        where = Path(tempfile.mkdtemp())
        stage = make_stage(w, [*SMALL, "ppo.steps=2", f"generation.cuda_graphs={graphs}"], where, "cuda")
        prof, at = profile(activities=[ProfilerActivity.CUDA]), [0]

        def pause():
            at[0] += 1
            if at[0] == 1:
                prof.start()
            elif at[0] == 2:
                torch.cuda.synchronize()
                prof.stop()

        train(stage, w.prompts, where, pause=pause)
        rows = sorted(prof.key_averages(), key=lambda e: -e.self_device_time_total)
        lines = read_metrics(where)
        return {
            "times": [{k: round(v, 3) for k, v in line.items() if k.startswith("time/")} for line in lines],
            "device_ms": round(sum(e.self_device_time_total for e in rows) / 1e3, 1),
            "launches": sum(e.count for e in rows),
            "kernels": [f"{e.key[:90]} x{e.count} {e.self_device_time_total / 1e3:.1f} ms" for e in rows[:32]],
        }


say("end")
