"""What a trained model is worth: loss by context position, tasks, reports."""
