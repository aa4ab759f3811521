"""What is trained: languages, translation, tasks one after another, side by side, or in few shots."""
