"""What head graphs cost at scale, and what ranks really send."""
