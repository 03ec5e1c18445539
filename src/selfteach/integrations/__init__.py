"""Use verifiers, critics and contexts inside other trainers, one module per trainer."""
