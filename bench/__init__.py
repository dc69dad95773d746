"""Named workloads, measured by one protocol, recorded as rows."""
