"""What can be named: references to models, published milestones, the Hugging Face Hub."""
