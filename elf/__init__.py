# SPDX-License-Identifier: GPL-3.0-only
"""What elfprobe.py and elfplot.py share about results, and the parts of elfprobe.py that need no BCC and no root.

Nothing here imports elfprobe.py or BCC, and nothing needs root. Each module imports only from those below it:

    summary                 all probes, by destination and hop; the tables
    findings                what the figures say of a path
    files                   the CSV and the log of a run
    paths        rows       destinations and hops; the columns of elf.csv
    histogram    counters   statistics of latencies; counters of elfprobe.c in words
    addresses    processes  addresses, their names, flows; which processes are targets
    console      extensions log and live table; what routers append to the packet that they quote
    usage                   errors and arguments
"""
