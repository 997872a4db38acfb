DELETE FROM {s}.change c WHERE NOT EXISTS (SELECT FROM {s}.version v WHERE v.tx = c.tx AND v.tx_at = c.tx_at);
DELETE FROM {s}.tx t WHERE NOT EXISTS (SELECT FROM {s}.version v WHERE v.tx = t.id AND v.tx_at = t.at);
