"""`python -m sae_query_steer`, for launchers that start a module: the command line."""

from sae_query_steer.cli.main import main

if __name__ == "__main__":
    main()
