"""Start and end of the ranks, groups, agreement, barriers and the watchdog."""
