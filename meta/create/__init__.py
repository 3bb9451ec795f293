"""From somebody's trained classifier to a bundle, as `driftkeel bundle create` does it."""
