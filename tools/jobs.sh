#!/usr/bin/env bash
# How many compilers may run at once: one a core, and 2 GB of free memory for each.
cores=$(nproc 2>/dev/null || echo 1)
memory=$(awk '/^MemAvailable:/ {print int($2 / 2000000)}' /proc/meminfo 2>/dev/null || echo 1)
((memory < cores)) && cores=$memory
((cores > 0)) || cores=1
echo "$cores"
