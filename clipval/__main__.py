"""python -m clipval"""

from clipval.cli import console

if __name__ == "__main__":
    console()
