"""`python -m metatrain`: the command of the package that lies in the working folder, installed or not."""

from metatrain.cli import main

if __name__ == "__main__":
    main()
