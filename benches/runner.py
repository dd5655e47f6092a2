#!/usr/bin/env python3
"""What the runner itself costs, beside DVC, Snakemake and ninja: the same graph, the same commands, the same disk.

    benches/runner.py [--program target/release/pipeline] [--stages 100 1000] [--peers ninja snakemake dvc] [--scratch DIR]

The graph is chains of four `cp`, the first of which reads a file of its own. Measured are the run of a part that is new, the run
of all when nothing is to be done, and for ours `plan`, `check` and `--version`. Peers are installed with pip into the scratch
folder, each in an environment of its own. A line is the median of its repeats: seconds of wall clock, seconds of processor,
and the largest memory of a process.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VERSIONS = {"ninja": "ninja==1.13.0", "snakemake": "snakemake==9.27.1", "dvc": "dvc==3.67.1"}


def install(peer, scratch):
    """The folder of a peer's programs."""
    place = scratch / "peers" / peer
    if not (place / "bin" / peer).exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        subprocess.run([place / "bin/pip", "-q", "install", VERSIONS[peer]], check=True)
    return place / "bin"


def files(folder, chains):
    folder.mkdir(parents=True)
    for chain in range(chains):
        (folder / f"in{chain}.txt").write_text(f"{chain}\n")


def ours(folder, chains):
    files(folder, chains)
    lines = ["version: 1", "name: chains", "stages:"]
    run = 'run: [cp, "{in.f}/f", "{out.f}/f"], inputs: {f: file}, outputs: {f: file}'
    for chain in range(chains):
        first = f'run: [cp, "{{code}}", "{{out.f}}/f"], code: in{chain}.txt, outputs: {{f: file}}'
        lines.append(f"  a{chain}: {{kind: command, with: {{{first}}}}}")
        for before, after in ("ab", "bc", "cd"):
            # Every stage is another one, as it is for the peers.
            env = f"env: {{STAGE: {after}{chain}}}"
            lines.append(f"  {after}{chain}: {{kind: command, in: {{f: {before}{chain}}}, with: {{{run}, {env}}}}}")
    (folder / "p.yaml").write_text("\n".join(lines) + "\n")


def ninja(folder, chains):
    files(folder, chains)
    lines = ["rule cp", "  command = cp $in $out"]
    for chain in range(chains):
        names = [f"in{chain}.txt"] + [f"{letter}{chain}.txt" for letter in "abcd"]
        lines += [f"build {after}: cp {before}" for before, after in zip(names, names[1:])]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")


def snakemake(folder, chains):
    files(folder, chains)
    last = ", ".join(f'"d{chain}.txt"' for chain in range(chains))
    lines = [f"rule all:\n    input: [{last}]"]
    for before, after in (("in", "a"), ("a", "b"), ("b", "c"), ("c", "d")):
        lines.append(f'rule {after}:\n    input: "{before}{{n}}.txt"\n    output: "{after}{{n,[0-9]+}}.txt"\n    shell: "cp {{input}} {{output}}"')
    (folder / "Snakefile").write_text("\n".join(lines) + "\n")


def dvc(folder, chains):
    files(folder, chains)
    lines = ["stages:"]
    for chain in range(chains):
        names = [f"in{chain}.txt"] + [f"{letter}{chain}.txt" for letter in "abcd"]
        for letter, before, after in zip("abcd", names, names[1:]):
            lines.append(f"  {letter}{chain}: {{cmd: cp {before} {after}, deps: [{before}], outs: [{after}]}}")
    (folder / "dvc.yaml").write_text("\n".join(lines) + "\n")


def measure(command, folder, repeats):
    """Medians of wall clock, processor and memory."""
    walls, processors = [], []
    for _ in range(repeats):
        before, since = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        walls.append(time.perf_counter() - since)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processors.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if done.returncode != 0:
            sys.exit(f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return statistics.median(walls), statistics.median(processors)


def memory(command, folder):
    """Largest memory of one process in MiB: of another process, since the largest of all children is kept for ever."""
    script = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=-3, stderr=-3); " \
             "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    done = subprocess.run([sys.executable, "-c", script, *command], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def line(stages, what, command, folder, repeats):
    wall, processor = measure(command, folder, repeats)
    print(f"{stages:>6}  {what:<32} {wall * 1000:>9.1f} ms  {processor * 1000:>9.1f} ms  {memory(command, folder):>6.0f} MiB", flush=True)
    return wall


def first_run(stages, what, command, folder, each):
    wall, processor = measure(command, folder, 1)
    print(f"{stages:>6}  {what:<32} {wall / each * 1000:>9.1f} ms  {processor / each * 1000:>9.1f} ms   a stage", flush=True)


def main():
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=root / "target/release/pipeline")
    parser.add_argument("--stages", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--peers", nargs="*", default=list(VERSIONS), choices=list(VERSIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path)
    args = parser.parse_args()
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="runner-bench-"))
    os.environ.update(DVC_NO_ANALYTICS="1", NO_COLOR="1")
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors; scratch folder {scratch}")
    print(f"{'stages':>6}  {'':<32} {'wall clock':>12}  {'processor':>12}  {'memory':>10}")
    pipeline = str(args.program.resolve())
    line(0, "ours --version", [pipeline, "--version"], scratch, 20)
    for stages in args.stages:
        folder = scratch / f"ours{stages}"
        shutil.rmtree(folder, ignore_errors=True)
        ours(folder, stages // 4)
        first_run(stages, "ours, first run", [pipeline, "run", "p.yaml", "--jobs", "2"], folder, stages)
        for command in (["run", "p.yaml"], ["plan", "p.yaml"], ["check", "p.yaml"]):
            line(stages, f"ours, nothing to do: {command[0]}", [pipeline, *command], folder, args.repeats)
        for peer in args.peers:
            programs = install(peer, scratch)
            folder = scratch / f"{peer}{stages}"
            shutil.rmtree(folder, ignore_errors=True)
            globals()[peer](folder, stages // 4)
            command = {
                "ninja": [str(programs / "ninja"), "-j2"],
                "snakemake": [str(programs / "snakemake"), "-c2", "--quiet", "all"],
                "dvc": [str(programs / "dvc"), "repro", "-q"],
            }[peer]
            if peer == "dvc":
                subprocess.run([programs / "dvc", "init", "-q", "--no-scm"], cwd=folder, check=True)
                subprocess.run([programs / "dvc", "config", "core.analytics", "false"], cwd=folder, check=True)
                if stages > 200:
                    print(f"{stages:>6}  dvc, first run: left out, since its cost grows with the square", flush=True)
                    continue
            first_run(stages, f"{peer}, first run", command, folder, stages)
            line(stages, f"{peer}, nothing to do", command, folder, args.repeats)


if __name__ == "__main__":
    main()
