"""Measure discdiff on a GPU against floors: ``python docs/gpu.py OUT`` writes OUT/gpu.json after every section.

``--rehearse`` runs every section tiny on the CPU. ``--page OUT/gpu.json`` writes the GPU part of docs/bench.md. All
times of a section are medians, in one process on one card: milliseconds by events on the device, or on the host's
clock around a synchronised call where it says "wall".
"""

import argparse
import json
import os
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import discdiff as dd
from discdiff import samplers as S
from discdiff.command import bench
from discdiff.kernels import dispatch as kernels
from discdiff.kernels.rows import LinearHead, Rows
from discdiff.operator import Run

Figures = dict[str, Any]


class Bench:
    """A device, and how work on it is timed."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.device = "cpu" if rehearse else "cuda"

    def synchronize(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    def device_ms(self, run: Callable[[], object], rounds: int = 20, warm: int = 3) -> float:
        """Milliseconds on the device."""
        if self.rehearse:
            return self.wall_ms(run, 1)
        for _ in range(warm):
            run()
        self.synchronize()
        taken = []
        for _ in range(rounds):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end))
        return round(statistics.median(taken), 4)

    def wall_ms(self, run: Callable[[], object], rounds: int = 5) -> float:
        """Milliseconds on the host's clock, the device's work included."""
        run()
        self.synchronize()
        taken = []
        for _ in range(rounds):
            start = time.perf_counter()
            run()
            self.synchronize()
            taken.append((time.perf_counter() - start) * 1e3)
        return round(statistics.median(taken), 4)

    def graph_ms(self, run: Callable[[], object]) -> float | str:
        """Milliseconds of one replay of a graph that holds ``run``."""
        if self.rehearse:
            return "rehearsed"
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return self.device_ms(graph.replay)

    def logits(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Random logits of standard deviation 2, made a part at a time."""
        made = torch.empty(shape, dtype=dtype, device=self.device)
        rows = made.flatten(0, -2)
        for start in range(0, len(rows), 1024):
            part = rows[start : start + 1024]
            part.copy_(torch.randn(part.shape, device=self.device) * 2)
        return made


def words(x: torch.Tensor) -> torch.Tensor:
    """The bits of x as int64 words, for the fastest pass that torch has over them."""
    flat = x.flatten()
    return flat[: flat.numel() * x.element_size() // 8 * 8 // x.element_size()].view(torch.int64)


def ceilings(b: Bench) -> Figures:
    """What the card reaches: copies, sums, matrix products."""
    count = (1 << 20 if b.rehearse else 1 << 31) // 8
    x = torch.empty(count, dtype=torch.int64, device=b.device).random_()
    y, n = torch.empty_like(x), 64 if b.rehearse else 8192
    z = torch.randn(4 * count // 2048, 2048, device=b.device).to(torch.bfloat16)
    left, right = (torch.randn(n, n, device=b.device).to(torch.bfloat16) for _ in range(2))
    return {
        "copy GB/s, reads and writes": 16 * count / b.device_ms(lambda: y.copy_(x)) / 1e6,
        "sum of int64 GB/s": 8 * count / b.device_ms(x.sum) / 1e6,
        "amax of bfloat16 rows GB/s": 2 * z.numel() / b.device_ms(lambda: z.amax(-1)) / 1e6,
        "bfloat16 matrix product TFLOP/s": 2 * n**3 / b.device_ms(lambda: left @ right.T) / 1e9,
    }


def passes(b: Bench) -> Figures:
    """The reading pass and draws over all rows, against one read of the logits."""
    sizes = [(torch.bfloat16, 50257), (torch.bfloat16, 126_464), (torch.float32, 50257)]
    out = {}
    for dtype, width in [(torch.bfloat16, 1500)] if b.rehearse else sizes:
        x = b.logits(8 if b.rehearse else int(1.6e9 / width / dtype.itemsize), width, dtype=dtype)
        ids, rows = torch.arange(len(x), device=b.device), Rows.of(x)
        key: dict[str, Any] = {"seed": 1, "rows": ids, "positions": ids, "backend": "triton"}

        def known() -> object:
            reading = kernels.read(rows, backend="triton")
            return reading.entropy, reading.max_prob

        c: Figures = {
            "rows": len(x),
            "one read": b.device_ms(words(x).sum),
            "amax": b.device_ms(lambda: x.amax(-1)),
            "read": b.device_ms(lambda: kernels.read(rows, backend="triton")),
            "read and draw": b.device_ms(lambda: kernels.draw(rows, **key)),
            "all statistics and draw": b.device_ms(
                lambda: kernels.draw(rows, reading=kernels.read(rows, top=True, backend="triton"), **key)
            ),
            "read, entropy, largest probability": b.device_ms(known),
        }
        part = x[: max(1, len(x) // 4)]
        textbook = b.device_ms(lambda: torch.multinomial(part.softmax(-1), 1), rounds=5)
        c["softmax and multinomial, of a quarter"] = textbook
        c["read, of the bandwidth of one read"] = round(c["one read"] / c["read"], 3)
        out[f"{str(dtype)[6:]} V={width}"] = c
        del x, rows
    return out


def steps(b: Bench) -> Figures:
    """One step of samplers, as users call it and as a graph, beside the textbook's and other packages'."""
    sizes = [(torch.bfloat16, 8, 1024, 126_464), (torch.bfloat16, 16, 512, 50257), (torch.float32, 8, 512, 50257)]
    out = {}
    t, s = 0.5, 0.5 - 1 / 16
    for dtype, batch, length, vocab in [(torch.float32, 2, 8, 700)] if b.rehearse else sizes:
        x = b.logits(batch, length, vocab, dtype=dtype)
        tokens = torch.randint(vocab, (batch, length), device=b.device)
        hidden = torch.where(torch.rand(batch, length, device=b.device) < 0.5, vocab, tokens)
        masked, uniform = dd.Masked(vocab, dd.Linear()), dd.Uniform(vocab, dd.Linear())
        c: Figures = {"one read": b.device_ms(words(x).sum)}
        for name, process, z, operator in (
            ("masked", masked, hidden, S.Ancestral()),
            ("uniform", uniform, tokens, S.Ancestral()),
            ("unmask max_prob", masked, hidden, S.Unmask(select="max_prob")),
            ("split leap", uniform, tokens, S.SplitLeap()),
        ):
            model = dd.Denoiser(lambda q, time, x=x: x[: len(q)], process, "loo")
            sampler = dd.Sampler(process, model, operator, grid=[t, s])

            def draw(sampler: dd.Sampler = sampler, z: torch.Tensor = z) -> object:
                return sampler.sample(*z.shape, seed=0, initial=z, device=b.device)

            c[f"{name}, wall"], c[f"{name}, device"] = b.wall_ms(draw), b.device_ms(draw)
            if operator == S.Ancestral():
                state, at = Run.start(model, batch, 0, device=b.device).begin(z, t, s, 1)

                def one(at: dd.At = at, state: dd.State = state, operator: dd.Operator = operator) -> object:
                    return operator(state, replace(at, run=replace(at.run, faults=[])))

                c[f"{name}, graph"] = b.graph_ms(one)
        part = max(1, batch // 8)  # the others need many times the memory
        q, w, own = x[:part], hidden[:part], tokens[:part]
        c["textbook masked, of an eighth"] = b.device_ms(lambda: bench.textbook_masked(q, w, 1 - t, 1 - s), 3, 1)
        c["textbook uniform, of an eighth"] = b.device_ms(lambda: bench.textbook_uniform(q, own, 1 - t, 1 - s), 3, 1)
        try:
            for name, run in bench._peers(q, w, own, t, s).items():
                c[f"{name}, of an eighth"] = b.device_ms(run, 3, 1)
        except Exception as wrong:  # theirs, not ours
            c["other packages"] = f"{type(wrong).__name__}: {str(wrong)[-200:]}"
        out[f"{str(dtype)[6:]} {batch}x{length}x{vocab}"] = c
        del x, q
    return out


def heads(b: Bench) -> Figures:
    """Hidden states to tokens in one kernel, against the matrix product that writes logits."""
    sizes = [(4096, 126_464, 4096), (4096, 126_464, 512), (2048, 50_304, 512), (768, 50_304, 8192), (4096, 126_464, 16)]
    out = {}
    for depth, width, count in [(32, 300, 4)] if b.rehearse else sizes:
        h = torch.randn(1, count, depth, device=b.device).to(torch.bfloat16)
        w = (torch.randn(width, depth, device=b.device) * 0.03).to(torch.bfloat16)
        ids = torch.arange(count, device=b.device)
        rows = Rows(h, torch.zeros_like(ids), ids, width, LinearHead(w))
        key: dict[str, Any] = {"seed": 1, "rows": ids, "positions": ids, "backend": "triton"}

        c: Figures = {"fused": b.device_ms(lambda: kernels.draw(rows, **key), 7)}
        if not b.rehearse:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            kernels.draw(rows, **key)
            c["fused, MiB allocated"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        c["matrix product"] = b.device_ms(lambda: h[0] @ w.T, 7)
        c["matrix product and draw"] = b.device_ms(lambda: kernels.draw(h[0] @ w.T, **key), 7)
        c["matrix product / fused"] = round(c["matrix product"] / c["fused"], 3)
        c["fused TFLOP/s"] = 2 * count * width * depth / c["fused"] / 1e9
        out[f"N={count} D={depth} V={width}"] = c
    return out


def small(b: Bench) -> Figures:
    """Steps that are made of launches: kernels, synchronisations and milliseconds a step."""
    out = {}
    count = 8
    for batch, length, vocab in [(2, 8, 5)] if b.rehearse else [(16, 256, 50), (256, 64, 17), (1, 1024, 256)]:
        x = torch.randn(batch, length, vocab, device=b.device)
        masked, uniform = dd.Masked(vocab, dd.Linear()), dd.Uniform(vocab, dd.Linear())
        for name, process, operator in (
            ("masked", masked, S.Ancestral()),
            ("uniform", uniform, S.Ancestral()),
            ("unmask max_prob", masked, S.Unmask(select="max_prob")),
            ("split leap", uniform, S.SplitLeap()),
            ("gibbs", uniform, S.Ancestral() >> S.Gibbs(sites=4)),
        ):
            model = dd.Denoiser(lambda q, time, x=x: x[: len(q)], process, "loo")
            sampler = dd.Sampler(process, model, operator, steps=count)

            def draw(sampler: dd.Sampler = sampler, batch: int = batch, length: int = length) -> object:
                return sampler.sample(batch, length, seed=0, device=b.device)

            c: Figures = {"wall ms a step": b.wall_ms(draw) / count}
            if not b.rehearse:
                kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
                with torch.profiler.profile(activities=kinds) as profile:
                    draw()
                    b.synchronize()
                events = profile.key_averages()
                on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
                c["kernels a step"] = sum(e.count for e in on_device) / count
                c["device ms a step"] = sum(e.self_device_time_total for e in on_device) / 1e3 / count
                c["synchronisations a step"] = sum(e.count for e in events if "Synchronize" in e.key) / count
            out[f"{batch}x{length}x{vocab} {name}"] = c
    return out


def waits(b: Bench) -> Figures:
    """Where the host waits for the device in a step of every operator."""
    out: Figures = {}
    batch, length, vocab = 4, 32, 40
    for process in (dd.Masked(vocab, dd.Linear()), dd.Uniform(vocab, dd.Linear())):
        x = torch.randn(batch, length, vocab, device=b.device)
        for name in S.__all__:
            label = f"{type(process).__name__} {name}"
            try:
                made = getattr(S, name)()
                operator = made if made.moves else S.Ancestral() >> made
                model = dd.Denoiser(lambda q, time, x=x: x[: len(q), : q.shape[1]], process, "loo")
                sampler = dd.Sampler(process, model, operator, grid=[0.6, 0.5, 0.4])
                initial = torch.randint(vocab, (batch, length))
                sampler.sample(batch, length, seed=0, initial=initial, device=b.device)
                if b.rehearse:
                    continue
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    torch.cuda.set_sync_debug_mode("warn")
                    try:
                        sampler.sample(batch, length, seed=0, initial=initial, device=b.device)
                    finally:
                        torch.cuda.set_sync_debug_mode("default")
                places: dict[str, int] = {}
                for warning in caught:
                    place = f"{os.path.basename(warning.filename)}:{warning.lineno}"
                    places[place] = places.get(place, 0) + 1
                out[label] = {"a step": sum(places.values()) / 2, "at": places}
            except Exception as wrong:  # an operator that has no meaning here
                out[label] = f"{type(wrong).__name__}: {str(wrong)[-120:]}"
    return out


SECTIONS = (ceilings, passes, steps, heads, small, waits)


def measure(folder: Path, rehearse: bool, limit: float) -> None:
    """Run the sections until the time is up, and keep what they found after each."""
    b, start = Bench(rehearse), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    record: Figures = {
        "card": "cpu" if rehearse else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "seconds": {},
    }
    for section in SECTIONS:
        name, begin = section.__name__, time.monotonic()
        if begin - start > limit:
            record[name] = "not measured: out of time"
            continue
        try:
            record[name] = section(b)
        except Exception as wrong:
            traceback.print_exc()
            record[name] = {"error": f"{type(wrong).__name__}: {str(wrong)[-800:]}"}
        record["seconds"][name] = round(time.monotonic() - begin, 1)
        (folder / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        print(name, json.dumps(record[name])[:1500], flush=True)
        if not rehearse:
            torch.cuda.empty_cache()


def rows_of(section: Figures) -> list[str]:
    """A table of a section: a line for each case, a column for each figure."""
    cases = {name: c for name, c in section.items() if isinstance(c, dict)}
    columns: Sequence[str] = list(dict.fromkeys(key for c in cases.values() for key in c))
    lines = [f"| figure | {' | '.join(cases)} |", f"|---|{'---:|' * len(cases)}"]
    for key in columns:
        cells = [c.get(key, "") for c in cases.values()]
        shown = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in cells]
        lines.append(f"| {key} | {' | '.join(shown)} |")
    return lines


def page(record: Figures) -> str:
    """The GPU part of docs/bench.md."""
    lines = [f"Measured on one {record['card']}, torch {record['torch']}; milliseconds unless a figure says otherwise."]
    lines += ["", "| ceiling | |", "|---|---:|"] + [f"| {k} | {v:.0f} |" for k, v in record["ceilings"].items()]
    for name, title in (("passes", "Reading pass and draws"), ("steps", "One step"), ("heads", "Head and draw")):
        lines += ["", f"### {title}", "", *rows_of(record[name])]
    lines += ["", "### Small steps", "", "| step | wall ms | device ms | kernels | synchronisations |"]
    lines += ["|---|---:|---:|---:|---:|"]
    keys = ("wall ms a step", "device ms a step", "kernels a step", "synchronisations a step")
    for name, c in record["small"].items():
        lines.append(f"| {name} | {' | '.join(f'{c[key]:.3g}' for key in keys)} |")
    lines += ["", "### Waits for the device, a step of each operator", ""]
    kinds = ("Masked", "Uniform")
    lines += [f"| operator | {' | '.join(kinds)} |", "|---|---:|---:|"]
    for name in dict.fromkeys(label.split()[1] for label in record["waits"]):
        found = [record["waits"].get(f"{kind} {name}") for kind in kinds]
        shown = [f"{c['a step']:g}" if isinstance(c, dict) else "refused" for c in found]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or write the page of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a folder for gpu.json, or the file itself with --page")
    parser.add_argument("--rehearse", action="store_true", help="run every section tiny on the CPU")
    parser.add_argument("--limit", type=float, default=210, help="seconds after which no section is begun")
    parser.add_argument("--page", action="store_true", help="write the GPU part of docs/bench.md")
    words = parser.parse_args()
    if not words.page:
        return measure(words.out, words.rehearse, words.limit)
    where = Path(__file__).parent / "bench.md"
    begin, end = "<!-- gpu -->", "<!-- end gpu -->"
    head, rest = where.read_text().split(begin)
    body = page(json.loads(words.out.read_text()))
    where.write_text(f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    main()
