"""The lab: settings, data, networks, a training loop, run records, comparisons, figures and reports (extra `lab`)."""
