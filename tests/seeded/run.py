"""Seeds known bugs of distillation programs into a copy of this one, one at a time, and runs the test that must fail.

    python tests/seeded/run.py [--copy FOLDER] [NAME ...]

Each bug of `bugs.json` says which text of which file it changes, and into what. All of them go into one copy of the repository's
files, each behind a switch (`SEEDED` in its text), so that the copy is built once: without the switch every test must pass, with the name
of a bug in the environment variable SEEDED its test must fail. A bug whose text is not there exactly once is an error: bugs.json is then to be
brought up to date. The copy is made anew each time; its build is kept in FOLDER/target. Exit status 1 where a bug was not caught.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
FAST = [f"--config=profile.dev.package.{name}.opt-level=0" for name in ("lm", "stages")]
PACKAGES = ("promptkd", "lm", "stages")


def copy_to(folder):
    files = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True)
    for name in files.stdout.decode().split("\0"):
        source, target = os.path.join(ROOT, name), os.path.join(folder, name)
        if not os.path.isfile(source):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if not os.path.exists(target) or open(source, "rb").read() != open(target, "rb").read():
            shutil.copyfile(source, target)


def seeded(bug, text):
    found = text.count(bug["right"])
    if found != 1:
        sys.exit(f"`{bug['name']}`: its text is {found} times in {bug['file']}, and must be there once: bring bugs.json up to date")
    switch = f'std::env::var("SEEDED").is_ok_and(|name| name == "{bug["name"]}")'
    assert "SEEDED" in bug["bug"], bug["name"]
    return text.replace(bug["right"], bug["bug"].replace("SEEDED", switch))


def seed(bugs, folder):
    for file in sorted({bug["file"] for bug in bugs}):
        path = os.path.join(ROOT, file)
        text = open(path).read()
        for bug in bugs:
            if bug["file"] == file:
                text = seeded(bug, text)
        target = os.path.join(folder, file)
        if open(target).read() != text:
            open(target, "w").write(text)


def build(folder):
    """The test programs of the libraries, by package."""
    packages = [f"--package={name}" for name in PACKAGES]
    command = ["cargo", "test", *packages, *FAST, "--lib", "--no-run", "--message-format=json-render-diagnostics"]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE)
    programs = {}
    for line in done.stdout.decode().splitlines():
        message = json.loads(line)
        if message.get("executable") and message.get("profile", {}).get("test"):
            programs[message["target"]["name"]] = message["executable"]
    return programs


def passes(program, folder, test, bug=""):
    package = {"lm": "stages/lm", "stages": "stages"}.get(os.path.basename(program).split("-")[0], "")
    environment = {**os.environ, "SEEDED": bug, "RUST_BACKTRACE": "0", "CARGO_MANIFEST_DIR": os.path.join(folder, package)}
    done = subprocess.run([program, "--exact", test], cwd=os.path.join(folder, package), env=environment, capture_output=True)
    if b"running 1 test" not in done.stdout:
        sys.exit(f"there is no test `{test}` in {program}")
    return done.returncode == 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--copy", default=os.path.join(tempfile.gettempdir(), "seeded"))
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    bugs = json.load(open(os.path.join(HERE, "bugs.json")))
    copy_to(arguments.copy)
    seed(bugs, arguments.copy)
    programs = build(arguments.copy)
    missed = 0
    for bug in bugs:
        if arguments.names and bug["name"] not in arguments.names:
            continue
        package, test = bug["test"]
        right, wrong = (passes(programs[package], arguments.copy, test, name) for name in ("", bug["name"]))
        said = "caught" if right and not wrong else "MISSED" if right else "BROKEN: the test fails without the bug"
        missed += said != "caught"
        print(f"{bug['name']:26} {said}   {package} {test}", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
