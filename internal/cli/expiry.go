package cli

import (
	"crypto/x509"
	"log/slog"
	"time"
)

// ExpiresSoon tells whether a certificate is about to end, or has: in the last
// 30 days, or the last quarter of a shorter life. What renews certificates by
// itself does so before.
func ExpiresSoon(leaf *x509.Certificate, now time.Time) bool {
	return leaf.NotAfter.Sub(now) < min(30*24*time.Hour, leaf.NotAfter.Sub(leaf.NotBefore)/4)
}

// expiryInterval is how often a certificate that is about to end is warned of.
const expiryInterval = 24 * time.Hour

// ExpiryWarning warns once a day of a certificate that is about to end.
type ExpiryWarning struct {
	What    string // such as tls.cert
	Renewal string // what to do
	Logger  *slog.Logger

	warned time.Time
}

// Look warns if it is time to.
func (w *ExpiryWarning) Look(leaf *x509.Certificate, now time.Time) {
	if !ExpiresSoon(leaf, now) {
		w.warned = time.Time{}
		return
	}
	if !w.warned.IsZero() && now.Sub(w.warned) < expiryInterval {
		return
	}
	w.warned = now
	says := "the certificate ends soon"
	if now.After(leaf.NotAfter) {
		says = "the certificate has ended"
	}
	w.Logger.Warn(says, "certificate", w.What, "certificate_until", leaf.NotAfter, "remedy",
		w.Renewal)
}
