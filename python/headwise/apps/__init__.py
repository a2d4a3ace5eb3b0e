"""Programs on top of the library: the command line, the study, the benchmarks, the pages."""
