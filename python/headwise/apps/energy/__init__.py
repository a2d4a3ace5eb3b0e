"""Energy of contenders, measured by hardware counters."""
