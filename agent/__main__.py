"""`python -m agent` is `shoal`, also where no script was installed."""

from agent.cli import main

if __name__ == "__main__":
    main(prog_name="shoal")
