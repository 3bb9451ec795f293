"""`python -m tests.cluster worker --config ...`: the command line, as a client of such a cluster."""

from tests.cluster import told
from worker.cli import main

with told():
    main()
