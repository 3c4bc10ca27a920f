"""`python -m nvlm.training STAGE.yaml [--set KEY=VALUE ...] [--resume]`."""

from .run import main

if __name__ == "__main__":
    main()
