"""`driftkeel console`: where the console's records, frames and figures come from, and how its commands leave."""
