"""Load, run and update the policy and the self-teacher."""
