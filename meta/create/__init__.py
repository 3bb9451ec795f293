"""`driftkeel bundle create`: from a user's trained classifier to a bundle."""
