-- What was recorded, each record once?
-- Pub/Sub delivers at least once, and an agent that was killed sends again: doubles have the
-- same id and time. A question of one's own begins here, with a filter on ts, which the
-- table wants and which reaches it through this view.
SELECT *
FROM tallyman.records
WHERE TRUE
QUALIFY ROW_NUMBER() OVER (PARTITION BY ts, id ORDER BY schema DESC) = 1
