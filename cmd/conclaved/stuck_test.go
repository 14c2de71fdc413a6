package main

import (
	"log/slog"
	"testing"
	"time"
)

// A node that hangs as it stops ends all the same; one that has stopped goes on living,
// for it may start again.
func TestEndIfStuck(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	ended := make(chan int, 1)
	endIfStuck(time.Millisecond, log, func(code int) { ended <- code })
	select {
	case code := <-ended:
		if code == 0 {
			t.Error("the process ends as if all were well")
		}
	case <-time.After(time.Minute):
		t.Fatal("the process does not end")
	}
	stop := endIfStuck(time.Hour, log, func(int) { t.Error("a process whose node has stopped is ended") })
	stop()
}
