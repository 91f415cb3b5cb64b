"""`python -m vanilla_transformer_commands` is `vanilla-transformer`; `accelerate launch -m` takes it too."""

from .main import main


if __name__ == "__main__":
    main()
