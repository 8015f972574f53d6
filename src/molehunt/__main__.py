"""`python -m molehunt` is the command `molehunt`."""

from molehunt.cli.main import main

if __name__ == "__main__":
    main()
