"""Where compressed segments live: keys, RAM arena, Redis, tier policy. Free of torch."""
