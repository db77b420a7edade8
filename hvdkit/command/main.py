"""The command line of `hvdkit`. It imports only the job that it runs, and TensorFlow only if that job needs it."""

import sys

from hvdkit.command import jobs
from hvdkit.command.arguments import dashed

_USAGE = "hvdkit JOB [options], hvdkit JOB --help"
_END = """\
Options:
  --version                  versions, and how Horovod was built
  --print-completion SHELL   completion of jobs and options, for bash, zsh or fish:
      hvdkit --print-completion bash > ~/.local/share/bash-completion/completions/hvdkit
      hvdkit --print-completion zsh > "${fpath[1]}/_hvdkit"
      hvdkit --print-completion fish > ~/.config/fish/completions/hvdkit.fish

Options may be spelled with dashes or underscores: --start-timeout, --start_timeout. Each job is also a module: `hvdkit
train` is `python -m hvdkit.train`. In a script of your own: import hvdkit as hvd; help(hvd) says what there is.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the job that the command line names and return the exit code: 2 if there is no such job."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        print(help_text(), file=sys.stderr)
        return 2
    first, *rest = arguments
    if first in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if first == "--version":
        from hvdkit.command import build

        print(build.versions_text())
        return 0
    if first.partition("=")[0] == "--print-completion":
        from hvdkit.command import completion

        return completion.show([*first.split("=")[1:], *rest])
    job = jobs.named(first)
    return jobs.run(job, rest) if job else _refuse(first)


def help_text() -> str:
    """Return the help text, with all jobs grouped by purpose."""
    lines = [f"usage: {_USAGE}", "", "Train Keras 3 models on TensorFlow across GPUs and hosts with Horovod.", ""]
    for group, members in jobs.GROUPS.items():
        lines += [f"{group}:", *(f"  {dashed(name):<15} {summary}" for name, summary in members.items()), ""]
    return "\n".join(lines) + f"\n{_END}".rstrip()


def _refuse(name: str) -> int:
    near = jobs.nearest(name)
    meant = f" Did you mean {dashed(near)}?" if near else ""
    what = "option" if name.startswith("-") else "command"
    print(f"hvdkit: There is no {what} {name!r}.{meant} `hvdkit --help` lists all.", file=sys.stderr)
    return 2
