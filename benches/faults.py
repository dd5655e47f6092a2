#!/usr/bin/env python3
"""What becomes of results when things go wrong: the same faults for ours, DVC and Snakemake, in one run.

    benches/faults.py [--program target/release/pipeline] [--peers snakemake dvc] [--scratch DIR]

One stage reads a file, takes two seconds, and writes what it read twice over; a second stage copies that. Then

    edit      the file is edited while the stage runs; does a result of the old bytes count as one of the new?
    kill      the runner is killed while the stage writes; does the half that is there count, or is a hand needed?
    orphan    ... and does the stage's process go on writing after that?
    flip      a byte of a kept result changes on the disk, its times do not; is it found before it is used?

A line says what was seen. Peers are installed with pip into the scratch folder.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from runner import VERSIONS, install

# Reads its input at once, writes a first half, and two seconds later the second. Says that it is there.
SLOW = """import pathlib, sys, time
source, target, alive = map(pathlib.Path, sys.argv[1:])
text = source.read_text()
with open(target, "w") as out:
    out.write(text)
    out.flush()
    for _ in range(20):
        alive.write_text(str(time.time()))
        time.sleep(0.1)
    out.write(text)
"""


class Ours:
    def __init__(self, folder, programs):
        self.folder, self.programs = folder, programs
        (folder / "code").mkdir()
        (folder / "code/slow.py").write_text(SLOW)
        alive = folder / "alive"
        (folder / "p.yaml").write_text(
            "version: 1\nname: faults\nstages:\n"
            "  input: {kind: command, with: {run: [cp, '{code}', '{out.f}/f'], code: input.txt, outputs: {f: file}}}\n"
            f"  slow: {{kind: command, in: {{f: input}}, with: {{run: [python3, slow.py, '{{in.f}}/f', '{{out.f}}/f', '{alive}'], "
            "code: code, inputs: {f: file}, outputs: {f: file}}}\n"
            "  copy: {kind: command, in: {f: slow}, with: {run: [cp, '{in.f}/f', '{out.f}/f'], inputs: {f: file}, outputs: {f: file}}}\n"
        )
        self.run = [str(programs), "run", "p.yaml"]

    def output(self, stage):
        shown = subprocess.run([str(self.programs), "show", "p.yaml", "--json"], cwd=self.folder, capture_output=True, text=True)
        return Path(json.loads(shown.stdout)["stages"][stage]["outputs"]["f"]["path"]) / "f"

    def result(self):
        return self.output("copy")

    def stored(self):
        """The bytes of the slow stage's result, as the store keeps them."""
        return self.output("slow").resolve()

    def again_from_the_damaged(self):
        return subprocess.run([*self.run, "--force", "copy"], cwd=self.folder, capture_output=True).returncode


class InPlace:
    """A program whose stages read and write beside one another in one folder."""

    def __init__(self, folder, programs):
        self.folder = folder
        (folder / "slow.py").write_text(SLOW)
        self.write(folder, programs)

    def result(self):
        return self.folder / "copy.txt"


class Snakemake(InPlace):
    def write(self, folder, programs):
        (folder / "Snakefile").write_text(
            'rule copy:\n    input: "slow.txt"\n    output: "copy.txt"\n    shell: "cp {input} {output}"\n'
            'rule slow:\n    input: "input.txt"\n    output: "slow.txt"\n    shell: "python3 slow.py {input} {output} alive"\n'
        )
        self.run = [str(programs / "snakemake"), "-c1", "copy.txt"]

    def stored(self):
        return self.folder / "slow.txt"

    def again_from_the_damaged(self):
        self.result().unlink()
        return again(self)[0]


class Dvc(InPlace):
    def write(self, folder, programs):
        (folder / "dvc.yaml").write_text(
            "stages:\n"
            "  slow: {cmd: python3 slow.py input.txt slow.txt alive, deps: [input.txt, slow.py], outs: [slow.txt]}\n"
            "  copy: {cmd: cp slow.txt copy.txt, deps: [slow.txt], outs: [copy.txt]}\n"
        )
        subprocess.run([programs / "dvc", "init", "-q", "--no-scm"], cwd=folder, check=True)
        self.run = [str(programs / "dvc"), "repro"]

    def stored(self):
        """In its cache, which is by the MD5 of what it holds."""
        digest = hashlib.md5(b"old\n" * 2).hexdigest()
        return self.folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]

    def again_from_the_damaged(self):
        (self.folder / "slow.txt").unlink()
        self.result().unlink()
        code = subprocess.run([self.run[0], "checkout", "slow"], cwd=self.folder, capture_output=True).returncode
        shutil.copy(self.folder / "slow.txt", self.result())
        return code or subprocess.run([self.run[0], "status"], cwd=self.folder, capture_output=True).returncode


def fresh(kind, scratch, programs, name):
    folder = scratch / f"faults-{kind.__name__}-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "input.txt").write_text("old\n")
    return kind(folder, programs)


def again(subject):
    done = subprocess.run(subject.run, cwd=subject.folder, capture_output=True, text=True)
    return done.returncode, (done.stdout + done.stderr).strip()


def start(subject):
    """The runner, when its slow stage has written its first half."""
    process = subprocess.Popen(
        subject.run, cwd=subject.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    until = time.time() + 120
    while not (subject.folder / "alive").exists():
        if time.time() > until or process.poll() is not None:
            raise SystemExit(f"{subject.run} did not come to its slow stage")
        time.sleep(0.02)
    time.sleep(0.3)
    return process


def judged(code, subject, expected):
    """What the user has after the same command once more."""
    if code != 0:
        return "the same command refuses to go on"
    found = subject.result().read_text()
    return "the right result" if found == expected else f"a wrong result passes for the right one: {found!r}"


def edit(subject):
    process = start(subject)
    (subject.folder / "input.txt").write_text("new\n")
    process.wait()
    return judged(again(subject)[0], subject, "new\n" * 2)


def kill(subject):
    process = start(subject)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.2)
    before = (subject.folder / "alive").read_text()
    time.sleep(0.5)
    lives = (subject.folder / "alive").read_text() != before
    # Whoever comes back does so after the stage has gone, or while it still writes.
    code, said = again(subject)
    verdict = judged(code, subject, "old\n" * 2)
    hint = next((line for line in said.splitlines() if "rerun-incomplete" in line or "unlock" in line.lower()), "")
    return f"{verdict}{': ' + hint.strip() if code and hint else ''}", "it goes on writing" if lives else "it is gone"


def flip(subject):
    code, said = again(subject)
    assert code == 0, said
    path = subject.stored()
    times = path.stat()
    os.chmod(path, 0o644)
    path.write_bytes(b"X" + path.read_bytes()[1:])
    os.chmod(path, times.st_mode)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return judged(subject.again_from_the_damaged(), subject, "old\n" * 2)


def main():
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=root / "target/release/pipeline")
    parser.add_argument("--peers", nargs="*", default=["snakemake", "dvc"], choices=["snakemake", "dvc"])
    parser.add_argument("--scratch", type=Path)
    args = parser.parse_args()
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="runner-faults-"))
    os.environ.update(DVC_NO_ANALYTICS="1", NO_COLOR="1")
    subjects = [("ours", Ours, args.program.resolve())]
    subjects += [(VERSIONS[peer], {"snakemake": Snakemake, "dvc": Dvc}[peer], install(peer, scratch)) for peer in args.peers]
    for name, kind, programs in subjects:
        print(f"{name:<20} edit    {edit(fresh(kind, scratch, programs, 'edit'))}", flush=True)
        after, orphan = kill(fresh(kind, scratch, programs, "kill"))
        print(f"{name:<20} kill    {after}", flush=True)
        print(f"{name:<20} orphan  {orphan}", flush=True)
        print(f"{name:<20} flip    {flip(fresh(kind, scratch, programs, 'flip'))}", flush=True)


if __name__ == "__main__":
    main()
