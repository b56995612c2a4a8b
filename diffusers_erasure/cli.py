"""The command line under its former name; it is in the package `diffusers_erasure_cli`."""

from diffusers_erasure_cli.app import app, main


__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
