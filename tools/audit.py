"""Whether the weights of a run, trained with `train.audit: true`, have seen every training task exactly once an epoch.

python tools/audit.py RUN     exits with 1 where they have not
"""

from __future__ import annotations

import argparse
import sys

from metatrain import storage
from metatrain.errors import MetatrainError
from metatrain.train.audit import audit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the run's folder")
    try:
        report = audit(storage.absolute(parser.parse_args().run))
    except MetatrainError as error:
        print(error, file=sys.stderr)
        return 2
    print(report)
    return 0 if report.exactly_once else 1


if __name__ == "__main__":
    sys.exit(main())
