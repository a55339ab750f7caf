"""What every program runs on: settings, schedule, loop, run folder, checkpoints, processes and trackers."""
