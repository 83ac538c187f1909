"""How compiling grows with the model: 2 → 48 layers of one architecture, passes on 100,000 nodes, Llama-70B on meta.

    ./run python benchmarks/compile_time.py
    ./run python benchmarks/compile_time.py --layers 2,4,8 --nodes 20000 --skip-meta

CPU seconds of one process. Depths take turns and each is measured several times; medians are shown. *Compile* is
``compile_with_adapters`` with an example, *watched* the same with ``capture="off"``, *graph* what
``AdaptedModel.capture`` takes.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def make_llama(layers: int) -> Any:
    """A Llama of small width in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def measure_cpu(action: Callable[[], Any]) -> float:
    """CPU seconds that ``action`` takes; garbage of what ran before is not counted."""
    gc.collect()
    started = time.process_time()
    action()
    return time.process_time() - started


def measure_depths(depths: list[int], repeats: int) -> dict[str, dict[int, float]]:
    """CPU seconds of compiling and of capturing, by way and number of layers."""
    import torch

    import adapter_compiler as ac

    torch.set_num_threads(1)
    tokens = torch.randint(0, 128, (2, 16))
    adapted = ac.compile_with_adapters(make_llama(1), (tokens,))
    adapted.capture(tokens)
    seconds: dict[str, dict[int, list[float]]] = {
        way: {depth: [] for depth in depths} for way in ("compile", "watched", "graph")
    }
    for _ in range(repeats):
        for depth in depths:
            model = make_llama(depth)
            for way, config in (("compile", ac.AdapterConfig()), ("watched", ac.AdapterConfig(capture="off"))):
                spent = measure_cpu(lambda m=model, c=config: ac.compile_with_adapters(m, (tokens,), config=c))
                seconds[way][depth].append(spent)
            adapted = ac.compile_with_adapters(model, (tokens,))
            seconds["graph"][depth].append(measure_cpu(lambda a=adapted: a.capture(tokens)))
    return {way: {d: statistics.median(times) for d, times in found.items()} for way, found in seconds.items()}


def make_long_graph(nodes: int) -> Any:
    """A traced stack of residual blocks with about ``nodes`` operators, and the module that holds its weights."""
    import torch
    from torch import nn
    from torch.fx import Graph, GraphModule

    aten = torch.ops.aten
    width, per_block = 4, 10
    base = nn.Module()
    base.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(nodes // per_block))
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, width, device="meta")

    def call(target: Any, *args: Any) -> Any:
        node = graph.call_function(target, args)
        node.meta["val"] = torch.empty(2, width, device="meta")
        return node

    for index in range(nodes // per_block):
        weight, bias = (graph.get_attr(f"module.blocks.{index}.{name}") for name in ("weight", "bias"))
        for node, shape in ((weight, (width, width)), (bias, (width,))):
            node.meta["val"] = torch.empty(shape, device="meta")
        hidden = call(aten.linear.default, x, weight, bias)
        hidden = call(aten.gelu.default, hidden)
        for _ in range(4):
            hidden = call(aten.mul.Tensor, hidden, 0.5)
        x = call(aten.add.Tensor, x, call(aten.relu.default, hidden))
    graph.output(x)
    root = nn.Module()
    root.module = base
    return GraphModule(root, graph), base


def measure_passes(nodes: int) -> dict[str, float]:
    """CPU seconds of each pass on a graph of about ``nodes`` nodes."""
    import torch

    from adapter_compiler.adapters.parameters.adapter_parameters import AdapterParameters
    from passes.adapt.fold_adapters import FoldAdaptersPass
    from passes.adapt.insert_adapters import InsertAdaptersPass
    from passes.analysis.weight_uses import find_parameter_aliases, find_weight_uses
    from passes.forms import SvdForm
    from passes.fuse.fuse_adapters import FuseAdaptersPass
    from passes.planning.find_sites import find_sites
    from passes.planning.plan import AdapterPlan, PlannedAdapter
    from passes.planning.selection import SiteSelection

    graph_module, base = make_long_graph(nodes)
    aliases = find_parameter_aliases(base)
    seconds: dict[str, float] = {"nodes": float(len(graph_module.graph.nodes))}
    found: dict[str, Any] = {}

    def take(name: str, action: Callable[[], Any]) -> None:
        seconds[name] = measure_cpu(lambda: found.__setitem__(name, action()))

    take("find uses", lambda: find_weight_uses(graph_module, aliases))
    take("find sites, roles and blocks", lambda: find_sites(found["find uses"], base, SiteSelection()))
    sites = found["find sites, roles and blocks"].sites
    plan = AdapterPlan(
        adapters=tuple(
            PlannedAdapter(site=site, form=SvdForm(), rank=2, scale=1.0, dtype=torch.float32) for site in sites
        )
    )
    adapter_parameters = AdapterParameters(plan, {name: p.device for name, p in base.named_parameters()})
    with torch.no_grad():
        for parameter in adapter_parameters.parameters():
            parameter.normal_(0, 0.02)
    graph_module.add_submodule("adapters", adapter_parameters)
    take("insert", lambda: InsertAdaptersPass(plan=plan, aliases=aliases)(graph_module))
    take("fuse", lambda: FuseAdaptersPass()(graph_module))
    graph_module, base = make_long_graph(nodes)
    graph_module.add_submodule(
        "adapters", AdapterParameters(plan, {name: p.device for name, p in base.named_parameters()})
    )
    InsertAdaptersPass(plan=plan, aliases=aliases)(graph_module)
    take("fold", lambda: FoldAdaptersPass(plan=plan)(graph_module))
    return seconds


def plan_llama_70b() -> dict[str, float]:
    """Plan Llama-3-70B's shapes without weights: CPU seconds, and the memory that the process came to need."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import adapter_compiler as ac

    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        use_cache=False,
    )
    started = time.process_time()
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    # With a mask, transformers does not look for packed sequences, for which it would read values.
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    adapted = ac.compile_with_adapters(model, (torch.randint(0, 100, (1, 16)),), {"attention_mask": mask})
    report = adapted.report()
    return {
        "cpu_seconds": time.process_time() - started,
        "sites": len(report.sites),
        "parameters": report.total_parameters,
        "trainable": report.trainable_parameters,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def run_in_process(option: str) -> dict[str, float]:
    """A measurement in a process of its own, so that its memory is its own."""
    done = subprocess.run([sys.executable, __file__, option], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2,4,8,16,32,48", help="numbers of layers, separated by commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--nodes", default="25000,50000,100000", help="sizes of graphs, separated by commas")
    parser.add_argument("--skip-meta", action="store_true", help="leave Llama-3-70B out")
    parser.add_argument("--meta", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.meta:
        print(json.dumps(plan_llama_70b()))
        return
    # First, while this process is small: a new process counts what the one that starts it holds as its own peak.
    meta = None if options.skip_meta else run_in_process("--meta")
    depths = [int(text) for text in options.layers.split(",")]
    seconds = measure_depths(depths, options.repeats)
    print("| layers | " + " | ".join(f"{way}, s | a layer, s" for way in seconds) + " |")
    print("|---:|" + "---:|---:|" * len(seconds))
    for depth in depths:
        cells = (f"{found[depth]:.2f} | {found[depth] / depth:.3f}" for found in seconds.values())
        print(f"| {depth} | " + " | ".join(cells) + " |")
    sizes = [measure_passes(int(text)) for text in options.nodes.split(",")]
    print("\n| pass | " + " | ".join(f"{size['nodes']:,.0f} nodes, s" for size in sizes) + " | µs a node |")
    print("|---|" + "---:|" * (len(sizes) + 1))
    for name in list(sizes[0])[1:]:
        last = 1e6 * sizes[-1][name] / sizes[-1]["nodes"]
        print(f"| {name} | " + " | ".join(f"{size[name]:.2f}" for size in sizes) + f" | {last:.1f} |")
    if meta is not None:
        print(
            f"\nLlama-3-70B's shapes on meta: {meta['sites']:.0f} sites of a model with {meta['parameters']:,.0f} "
            f"parameters planned in {meta['cpu_seconds']:.1f} CPU seconds, {meta['peak_mb']:,.0f} MB at most."
        )


if __name__ == "__main__":
    main()
