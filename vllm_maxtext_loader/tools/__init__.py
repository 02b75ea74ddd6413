"""What the commands do: functions that return results and print nothing."""
