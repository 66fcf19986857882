# SPDX-License-Identifier: GPL-3.0-only
"""What elfprobe.py and elfplot.py know of results: rows, summary, findings, console.

Nothing here imports elfprobe.py or bcc, and nothing needs root. Each module imports only from those below it:

    summary             all probes, by destination and hop; the tables
    findings            what the figures say of a path
    paths       rows    destinations and hops; the columns of elf.csv
    histogram           statistics of latencies
    addresses   console addresses, flows and host names as text; the log and the live table
    usage   extensions  errors and arguments; what routers append to the packet that they quote
"""
