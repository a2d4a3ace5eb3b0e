"""``headwise compare``: static against dynamic head selection, on a real model and a real task."""
