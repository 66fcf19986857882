# SPDX-License-Identifier: GPL-3.0-only
"""What elfprobe.py and elfplot.py share about results, and the parts of elfprobe.py that need no BCC.

Nothing here imports elfprobe.py or BCC. To lock a device (sole_user()), and to see the connections of others
(poller), a process needs rights; nothing else does. Each module imports only from those below it:

    unprobed     poller     why targets have no probes; the fallback that reads connection tables
    results      options    from what the kernel tells to rows, findings and the log; the command line
    loop                    timers, signals and errors of the main loop
    live         pcapng     the live view; packets as a capture
    report       metrics    FILEBASE.json; metrics for scrapers
    exporter     command    the process that serves them; the command of "-- COMMAND"
    unmatched               answers that quote no probe, because a middlebox changed it
    summary                 all probes, by destination, flow and hop; the tables
    findings                what the figures say of a path
    files                   CSV, log and report as files
    paths        rows       destinations and hops; the columns of elf.csv
    histogram    counters   statistics of latencies; counters of elfprobe.c in words
    clock                   how CLOCK_MONOTONIC maps to UTC
    devices                 the network devices of a run
    reasons                 why a target has no probes, in words
    network                 routes and translated addresses
    addresses    processes  addresses, their names, flows; which processes are targets
    source                  what BCC compiles
    machine                 the kernel, and what this process may do
    console      extensions log, live table, standard output; what routers append to the packet that they quote
    service      bytecode   the service manager; these modules, kept for the next start
    cache                   files that are kept for it
    usage        ring       errors and arguments; a ring buffer that is mapped
"""
