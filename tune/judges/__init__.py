"""What looks at images: a judge measures how well they follow their prompts, and how they vary."""
