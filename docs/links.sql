-- The links that most flows with trouble have in common: a vote of flows over links, as in 007 (Arzani et al., NSDI 2018).
--
-- probes is a table of the rows of all hosts: column host, and the columns of elf.csv. docs/fleet.md fills it. Each flow
-- whose TCP retransmitted while it was probed has one vote, which it splits evenly among the links on its path. A link
-- goes by its far end: routers answer from the address at which the packet arrived. The nearer end has one address for
-- each link that leads to it, of which one is shown. SQL that DuckDB and SQLite (3.28) take.
WITH answers AS (
    SELECT host, dest, sport, dport, protocol, outttl, responder, COUNT(*) AS answered
    FROM probes
    WHERE responder <> ''
    GROUP BY host, dest, sport, dport, protocol, outttl, responder
),
usual AS ( -- who answers most, for each hop of each flow
    SELECT answers.*, ROW_NUMBER() OVER (
        PARTITION BY host, dest, sport, dport, protocol, outttl ORDER BY answered DESC, responder) AS place
    FROM answers
),
flow_links AS (
    SELECT host, dest, sport, dport, protocol, responder AS far_end,
        COALESCE(LAG(responder) OVER (PARTITION BY host, dest, sport, dport, protocol ORDER BY outttl), host) AS near_end,
        COUNT(*) OVER (PARTITION BY host, dest, sport, dport, protocol) AS links
    FROM usual
    WHERE place = 1
),
flows AS (
    SELECT host, dest, sport, dport, protocol, COALESCE(MAX(retrans) - MIN(retrans), 0) AS retransmitted
    FROM probes
    GROUP BY host, dest, sport, dport, protocol
)
SELECT MIN(near_end) AS near_end, far_end,
    COUNT(*) AS flows,
    SUM(CASE WHEN retransmitted > 0 THEN 1 ELSE 0 END) AS flows_with_trouble,
    COUNT(DISTINCT host) AS hosts,
    SUM(CASE WHEN retransmitted > 0 THEN 1.0 / links ELSE 0.0 END) AS votes
FROM flow_links JOIN flows USING (host, dest, sport, dport, protocol)
GROUP BY far_end
ORDER BY votes DESC, flows DESC, far_end;
