"""Runs `shoal ARGUMENTS` for a starter and never outlives it: `python child.py STARTER_PID ...`.

Linux ends this process with SIGKILL when the thread that started it ends, however that happens.
"""

import os
import sys


def main() -> None:
    """Tie our life to the starter's, then be `shoal`."""
    if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]  # this folder, whose modules are only found as agent.*
    starter_pid = int(sys.argv.pop(1))
    if sys.platform == "linux":
        import ctypes
        import signal

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != starter_pid:  # it ended before the call
            sys.exit("the starting process is gone")
    from agent.cli import main as shoal

    shoal(prog_name="shoal")


if __name__ == "__main__":
    main()
