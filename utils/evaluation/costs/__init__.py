"""What a dry run of an evaluation announces: trainings, answers, minutes. Nothing is loaded, not even torch."""
